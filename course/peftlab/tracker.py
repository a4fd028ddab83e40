"""The allocation tracker behind `peftlab.memory` on the CPU."""

from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker


class PeftMemTracker(MemTracker):
    """PyTorch's `MemTracker`, made to accept frozen parameters, and fast on models of many modules.

    The stock tracker hooks the gradient of every parameter of a module, and a parameter that does not require one
    refuses the hook. Here such a parameter counts as hooked already. The stock tracker also goes through all modules at
    every operation, to note each one's own peak; here only the peak of the whole step is kept.
    """

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True):
        for parameter in module.parameters():
            if not parameter.requires_grad and self._param_to_grad_hook_handles.get(parameter) is None:
                self._param_to_grad_hook_handles[parameter] = (_NoHook(), _NoHook())
        return super()._track_module_params_and_buffers(module, install_grad_hooks)

    moments: list[dict[str, int]] | None = None
    """If it is a list, the bytes by category after each operation are appended to it."""

    def _update_peak_stats(self, peak_state) -> None:
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)
        if self.moments is not None:
            self.moments.append(self.bytes_by_category("current"))

    def restart_peak(self) -> None:
        """Forget the peak so far: from now on it is the largest moment since now."""
        for device, now in self._curr_mem_snap.items():
            self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)

    def bytes_by_category(self, kind: str) -> dict[str, int]:
        """Return the bytes of the "current" moment or the "peak", summed over devices, by MemTracker's category."""
        total: dict[str, int] = {}
        for snapshot in self.get_tracker_snapshot(kind).values():
            for category, size in snapshot.items():
                name = getattr(category, "value", category)
                total[name] = total.get(name, 0) + size
        return total


class _NoHook:
    """Stands for the handle of a hook that was never set."""

    def remove(self) -> None:
        """Do nothing: there is no hook to remove."""
