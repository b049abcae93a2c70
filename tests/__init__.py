"""The tests, by the folders of the package: `tests/comm/test_sender.py` is about `ds_ddg/comm/sender.py`."""
