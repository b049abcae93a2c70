"""The delayed engine: ``engine.py`` puts it on DeepSpeed's; follow a call in ``calls.py``, then ``micro_batch.py``."""

from ds_ddg.engine.engine import DDGEngine

__all__ = ["DDGEngine"]
