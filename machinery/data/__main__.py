"""`python -m machinery.data` finds or downloads CIFAR-10; exit status 3 if it is out of reach, 1 if damaged."""

import sys

from machinery.data.cifar10 import FOLDER, prepare
from machinery.errors import DataError, DataUnreachableError

if __name__ == "__main__":
    try:
        print(f"CIFAR-10 is in {prepare() / FOLDER}")
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(3 if isinstance(error, DataUnreachableError) else 1)
