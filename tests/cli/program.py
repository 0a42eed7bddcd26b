"""The program as a user starts it, in a process of its own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = (
    "import sys; from localmimo.cli.app import run; code = run(sys.argv[1:]); "
    "heavy = sorted({'torch', 'transformers', 'bitsandbytes', 'accelerate'} & set(sys.modules)); "
    "print('heavy:', heavy, file=sys.stderr); sys.exit(code)"
)


def localmimo(*arguments: str, script: str = WITHOUT_TORCH, stdin: str = "") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr
