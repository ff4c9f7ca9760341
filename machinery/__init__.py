"""What model.py, dataset.py, train.py and utils.py build on."""
