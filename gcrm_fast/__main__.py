"""``python -m gcrm_fast COMMAND ...``, and ``torchrun -m gcrm_fast COMMAND ...``: the same as ``gcrm``."""

import sys

from gcrm_fast.cli import main

sys.exit(main())
