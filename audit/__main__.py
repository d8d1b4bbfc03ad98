"""Many runs, one question: `python -m audit CONFIG.yaml`."""

import sys

from audit.run import main
from runtime.program import run_program

if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
