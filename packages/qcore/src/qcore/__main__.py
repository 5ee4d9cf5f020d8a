"""`python -m qcore`, for launchers such as torchrun."""

import sys

from qcore.cli import main

sys.exit(main())
