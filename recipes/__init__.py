"""Complete trainings, each a script to read from top to bottom, copy and change; docs/recipes.md has them all."""

from ds_ddg.extras import require

require("recipes", "a recipe")
