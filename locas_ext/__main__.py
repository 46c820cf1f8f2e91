import sys

from locas_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
