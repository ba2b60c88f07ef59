import sys

from pygen.cli import main

sys.exit(main())
