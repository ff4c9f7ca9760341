"""The peak memory of training at several batch sizes.

`python benchmarks/memory.py` trains on synthetic images, made as many as CIFAR-10, in a process of its own.
"""

import subprocess
import sys
import tempfile

from common import FOLDER, report

from train import Config

CODE = """
import resource, sys
sys.path.insert(0, {repository!r})
from machinery.data import cifar10
from train import Config, fit
if __name__ == "__main__":
    cifar10.SYNTHETIC_COUNTS.update({{True: 50_000, False: 10_000}})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fit(Config(data="synthetic", epochs=1, batch_size={batch_size}))
    own, worker = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(before, own, worker)
"""


def main() -> None:
    rows = []
    for batch_size in (125, 250, Config().batch_size, 1000):
        code = CODE.format(repository=str(FOLDER.parent), batch_size=batch_size)
        with tempfile.TemporaryDirectory() as folder:
            run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
        rows.append((batch_size, *(round(int(kib) * 1024 / 1e9, 2) for kib in run.stdout.splitlines()[-1].split())))
    report("memory", ("batch size", "GB after the imports", "GB at the peak", "GB of the worker at its peak"), rows)


if __name__ == "__main__":
    main()
