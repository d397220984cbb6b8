"""Install MegaBlocks and Triton's interpreter into a folder of their own, beside the packages of this interpreter.

    python tests/megablocks/install.py FOLDER

The folder (0.7 GB, nearly all Triton) goes in front on PYTHONPATH, so nothing is installed twice and the environment
without it stays as it was. Nothing is compiled: the two packages that insist on nvcc to be installed are given a
`torch` whose CUDA extensions are empty; tests/megablocks/cpu_ops.py takes the place of what is missing.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TRITON = "triton==3.7.1"
PINNED = ["megablocks==0.10.0", "stanford-stk==0.7.1", "grouped_gemm==0.3.0", "kernels==0.17.2"]
NO_TRITON = 75
"""Exit code when Triton could not be had. It is the one large download, and the one reason to go on without."""

NO_COMPILER = """
from setuptools import Extension
from setuptools.command.build_ext import build_ext

CUDA_HOME = None


class BuildExtension(build_ext):
    def run(self):
        pass


def CUDAExtension(name, *_, **__):
    return Extension(name, [])
"""


def install(folder: Path) -> int:
    """Exit code: pip's, or NO_TRITON."""
    with tempfile.TemporaryDirectory() as stub:
        utils = Path(stub, "torch", "utils")
        utils.mkdir(parents=True)
        (utils.parent / "__init__.py").write_text('__version__ = "0"\n')
        (utils / "__init__.py").touch()
        (utils / "cpp_extension.py").write_text(NO_COMPILER)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", folder]
        environment = {**os.environ, "PYTHONPATH": stub, "TORCH_CUDA_ARCH_LIST": "8.0"}
        if subprocess.run([*pip, TRITON]).returncode:
            return NO_TRITON
        return subprocess.run([*pip, *PINNED], env=environment).returncode


if __name__ == "__main__":
    code = install(Path(sys.argv[1]))
    if code == 0:
        print(f"TRITON_INTERPRET=1 PYTHONPATH={Path(sys.argv[1]).resolve()} python -m pytest -m megablocks")
    sys.exit(code)
