"""Run by hpc.shrink.gguf in a process of its own: a .gguf file loaded by llama.cpp, its tokenizer against the original.

    python -m hpc.shrink.gguf_check FILE TOKENIZER_FOLDER

A .gguf file names its pre-tokenizer, the rule that cuts a text into words before BPE; with a wrong one the model
answers a little worse and nothing fails.
"""

import sys
from pathlib import Path

from hpc.errors import GreenMoEError
from hpc.runtimes.llama_cpp import LlamaCpp
from hpc.runtimes.tokens import PROBES, check_special, check_tokens


def main() -> int:
    """Load and compare; 0 when all is well, else a line on stderr and an exit code of hpc.errors."""
    try:
        runner = LlamaCpp(Path(sys.argv[1]), context_length=64, threads=1)
        check_tokens(runner, Path(sys.argv[2]), PROBES)
        check_special(runner, Path(sys.argv[2]))
    except GreenMoEError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
