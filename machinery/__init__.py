"""The machinery behind model.py, dataset.py, train.py and utils.py: users need not open it."""
