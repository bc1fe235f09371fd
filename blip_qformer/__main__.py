"""`python -m blip_qformer`, from the pack's folder: the command line without anything installed."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
