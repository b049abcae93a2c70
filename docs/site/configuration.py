"""Writes docs/configuration.md from the model of the ``"ddg"`` block, so that the two cannot differ.

With ``--check`` it writes nothing, and fails if the page is stale.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ds_ddg.config import DDGConfig

PAGE = Path(__file__).resolve().parents[1] / "configuration.md"

HEAD = """# Configuration

<!-- Written by `python docs/site/configuration.py`; change ds_ddg/config.py, not this page. -->

The settings stand in the `"ddg"` block of the DeepSpeed config, a JSON file or a dictionary. All are optional; these
are the defaults:

```json
{defaults}
```

An unknown key, a wrong type or a value out of range is an error that names the key, the value and what is allowed.
`ds-ddg check ds.json --stages 4` says what a config does before anything is started. `gradient_accumulation_steps` is
M, the number of micro-batches per call; everything else in the config is DeepSpeed's, and works as
[described there](https://www.deepspeed.ai/docs/config-json/), but for what [Limitations](limitations.md) lists.

| key | values | default | meaning |
|---|---|---|---|
"""

TAIL = """
[Choosing M, slack and the rest](choosing.md) says which values to take when.
"""


def page() -> str:
    """Return the text of the page."""
    fields = DDGConfig.model_fields
    schema = DDGConfig.model_json_schema()
    defaults = json.dumps({"ddg": DDGConfig().model_dump()}, indent=2)
    rows = []
    for name, field in fields.items():
        property_ = schema["properties"][name]
        default = json.dumps(DDGConfig().model_dump()[name])
        assert field.description, f"{name} has no docstring"
        meaning = " ".join(field.description.split()).replace("``", "`")
        rows.append(f"| `{name}` | {_values(property_)} | `{default}` | {meaning} |")
    return HEAD.format(defaults=defaults) + "\n".join(rows) + "\n" + TAIL


def _values(schema: dict[str, Any]) -> str:
    """Describe the values that a JSON schema allows."""
    if "$ref" in schema:
        return "a block"
    if "anyOf" in schema:
        return ", ".join(map(_values, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f'`"{value}"`' for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    kind = {"boolean": "`true`, `false`", "null": "`null`", "string": "text"}.get(schema["type"])
    kind = kind or {"integer": "integer", "number": "number"}[schema["type"]]
    return f"{kind} >= {schema['minimum']}" if "minimum" in schema else kind


def main() -> int:
    """Write the page, or compare it."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE} is not what ds_ddg/config.py says; run `make docs` and commit it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
