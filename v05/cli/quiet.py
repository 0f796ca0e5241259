"""Other packages' progress bars, which would run through ours."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Turn off the progress bars of transformers in this process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
