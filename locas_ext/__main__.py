import sys

from locas_ext.cli import main

sys.exit(main())
