"""Messages between the stages of a pipeline: asynchronous, point to point, from raw bytes up to losses."""
