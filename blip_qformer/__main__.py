"""`python -m blip_qformer` in the pack's folder, `python path/to/blip_qformer` from anywhere, or `blip-qformer`."""

import sys
from importlib import import_module
from pathlib import Path

FAILED = 2  # what the commands end with, too


def main() -> int:
    """Run the command line, or say in one line which package this Python lacks.

    Returns:
        The exit code, see :func:`~blip_qformer.cli.command_line.run_command`.
    """
    try:
        run = import_module("blip_qformer.cli").main  # absolute: run by its path, this file has no package
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "blip_qformer":
            raise
        print(
            f"blip-qformer: the package {error.name} is missing in this Python ({sys.executable}): use the Python that "
            "runs ComfyUI, or run pip install '.[library]' in the folder of the pack.",
            file=sys.stderr,
        )
        return FAILED
    return run()


if __name__ == "__main__":
    if not __package__:  # run by its path, as ComfyUI portable's Python must be
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
