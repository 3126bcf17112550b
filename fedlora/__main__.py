"""`python -m fedlora` is `fedlora`."""

import sys

from fedlora.cli import main

sys.exit(main())
