"""What the drivers of unit 14 call; it travels with them, so it imports what it uses."""


def in_ranks(world_size, act):
    """Call `act(watch)` in so many ranks at once; return what it returns in each.

    `watch.call(function, *arguments)` calls the student's code. Afterwards `watch.calls` says which collectives it called, and
    `watch.left(*known)` how many bytes are left of tensors that it made, apart from those known. Before a collective, the ranks
    tell each other on a board in shared memory which one it is. So a rank that would wait for ever is found at once, whether
    the others have ended or wait in another collective. `watch.agree(fine)` says whether it is fine in every rank.

    What is raised reads as the student's own error, with the line in their code.
    """
    import gc
    import mmap
    import sys
    import time
    import traceback
    import warnings
    from collections import Counter

    import torch
    import torch.distributed as dist
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode

    from peftlab.distributed import run

    names = ["all_gather", "reduce_scatter", "all_reduce", "broadcast", "barrier", "all_to_all", "gather", "scatter", "reduce"]
    yes, no, ended, most_steps = 100, 101, 102, 1000
    board = mmap.mmap(-1, world_size * most_steps)

    class StudentError(Exception):
        pass

    class WaitsForEverError(Exception):
        pass

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.step, self.calls, self.made, self.patience = 0, Counter(), [], 0.4

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace in ("c10d", "_c10d_functional"):
                called = function._schema.name.replace("_", "")
                name = next((name for name in names if name.replace("_", "") in called), None)
                if name is not None:
                    self.calls[name] += 1
                    said = self.meet(names.index(name) + 1)
                    if len(set(said)) > 1:
                        raise WaitsForEverError()
            outcome = function(*args, **(kwargs or {}))
            for tensor in outcome if isinstance(outcome, (list, tuple)) else [outcome]:
                if type(tensor) in (torch.Tensor, torch.nn.Parameter):
                    self.made.append((StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()))
            return outcome

        def call(self, function, *arguments):
            self.calls, self.made = Counter(), []
            with self:
                return function(*arguments)

        def meet(self, code):
            """Say what this rank does next, and return what all do."""
            board[dist.get_rank() * most_steps + self.step] = code
            places = [rank * most_steps + self.step for rank in range(world_size)]
            while not all(board[place] for place in places):
                time.sleep(0.0001)
            said = [board[place] for place in places]
            if ended in said:
                raise WaitsForEverError()
            self.step += 1
            return said

        def agree(self, fine):
            """Return whether it is fine in every rank."""
            return self.meet(yes if fine else no) == [yes] * world_size

        def wait_for_higher_ranks(self):
            """Wait until each of them has called its next collective, or has ended."""
            places = [rank * most_steps + self.step for rank in range(dist.get_rank() + 1, world_size)]
            until = time.monotonic() + 2  # they may wait for this one in a way of their own
            while not all(board[place] for place in places) and time.monotonic() < until:
                time.sleep(0.0001)

        def left(self, *known):
            known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in known}
            until = time.monotonic() + self.patience
            while True:
                alive = {ref.cdata: size for ref, size in self.made if ref.cdata not in known and not ref.expired()}
                if not alive:
                    return 0
                if time.monotonic() > until:
                    self.patience = 0.05
                    return sum(alive.values())
                time.sleep(0.002)  # a thread of gloo's may not yet have let go of a tensor that it has sent

    def place_of(error):
        """Return the student's line in which an error was raised, or None if there is none."""
        here = (sys._getframe().f_code.co_filename, act.__code__.co_filename)
        libraries = ("torch", "safetensors", "jaxtyping", "peftlab")
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if frame.filename not in here and not any(f"/{name}/" in frame.filename for name in libraries):
                return f" (line {frame.lineno} of `{frame.name}`" + (f": {frame.line})" if frame.line else ")")
        return None

    def begin():
        warnings.simplefilter("ignore")
        watch, rank = Watch(), dist.get_rank()
        gc.freeze()  # what was there before the fork need not be gone through
        try:
            return "returned", act(watch), watch.step
        except NotImplementedError:
            raise
        except WaitsForEverError as error:
            return "waits", place_of(error) or "", watch.step
        except Exception as error:
            described, place = f"{type(error).__name__}: {error}", place_of(error)
            if place is None and isinstance(error, (AttributeError, TypeError)):
                return "raised", f"what came back cannot be used: {described}", watch.step
            return "raised", f"{described}, in rank {rank} of {world_size}{place or ''}", watch.step
        finally:
            if not board[rank * most_steps + watch.step]:
                board[rank * most_steps + watch.step] = ended

    outcomes = run(begin, world_size)
    for how, what, _ in outcomes:
        if how == "raised":
            raise StudentError(what)
    for how, place, step in outcomes:
        if how == "waits":
            said = [board[rank * most_steps + step] for rank in range(world_size)]
            states = [f"waits in {names[code - 1]}" if code <= len(names) else "has ended" for code in said]
            each = ", ".join(f"rank {rank} {state}" for rank, state in enumerate(states))
            raise StudentError(f"no error, but waits for ever: {each}{place}")
    return [what for _, what, _ in outcomes]
