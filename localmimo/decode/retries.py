"""Retries: a pass of the model is run again, with less of the device's memory in use, where it ran out of it.

Knows errors of the device. Must not know tokens, caches or what a pass computes.
"""

from collections.abc import Callable
from traceback import clear_frames
from typing import TypeVar

import torch

from localmimo.hardware.device import broke_down, out_of_memory

Result = TypeVar("Result")


def nothing_to_shrink() -> bool:
    """The default where a device runs out of memory: there is none to give back."""
    return False


def run_with_retries(
    run: Callable[[], Result],
    undo: Callable[[], None],
    shrink: Callable[[], bool],
    give_up: Callable[[], None],
) -> Result:
    """The result of `run`. After any error `undo` is called first, so that `run` leaves no trace.

    Where the device is out of memory, `shrink` gives some of it back and `run` is repeated; once `shrink` returns
    False, `give_up` is called and DoesNotFit is raised. A device that broke down becomes NoDevice.
    """
    while True:
        try:
            return run()
        except torch.OutOfMemoryError as error:
            undo()
            clear_frames(error.__traceback__)  # tensors that they refer to could not be freed
            if not shrink():
                give_up()
                raise out_of_memory(error) from error
        except RuntimeError as error:
            undo()
            if (sentence := broke_down(error)) is None:
                raise
            raise sentence from error
        except BaseException:
            undo()
            raise
