"""What runs in the student's kernel: it travels there as source, and uses nothing from this package.

It runs among names of its own, for the student's may be called `list` or `globals`.
"""


def prepare_kernel() -> None:
    """Let the student's own modules be found, and let a notebook go on after it has closed what a kernel needs.

    The working directory is searched where Jupyter searches it, but only from now on: what lies there must not take the
    place of what a kernel starts with.
    """
    import os
    import sys

    from IPython import get_ipython

    environment = [place for place, path in enumerate(sys.path) if os.path.basename(path) in ("site-packages", "dist-packages")]
    if "" not in sys.path:
        sys.path.insert(environment[0] if environment else len(sys.path), "")
    home, streams = os.getcwd(), {"stdout": sys.stdout, "stderr": sys.stderr}
    for stream in streams.values():
        stream.close = lambda: None

    def mend(*details: object) -> None:
        for name, stream in streams.items():
            present = getattr(sys, name, None)
            if not callable(getattr(present, "write", None)) or getattr(present, "closed", False):
                setattr(sys, name, stream)
        try:
            os.getcwd()
        except OSError:  # the folder is gone
            os.chdir(home)

    get_ipython().events.register("post_execute", mend)


def call_driver(names: dict, source: str, driver: str, answers: list[str], arguments: str, mime_type: str) -> None:
    """Call `driver(*answers, **arguments)` there, and send what it returns as a display of the given type.

    Args:
        names: the student's global names.
        source: defines the driver.
        answers: names of the student's functions or classes.
        arguments: what `torch.save` makes of the keyword arguments, in base64.
        mime_type: of the reply, which is what `torch.save` makes of the driver's, in base64. If the call raised, the
            display's plain text says what, and the reply is empty.

    What the student's cells have set for all of torch (the default dtype and device, whether gradients are kept) does not
    hold while the driver runs.
    """
    import base64
    import io

    import torch
    from IPython.display import publish_display_data

    error, reply = "", io.BytesIO()
    dtype, device, gradients = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    try:
        missing = [name for name in answers if name not in names]
        if missing:
            raise NameError(f"`{'` and `'.join(missing)}` not defined: is the cell missing, or did it raise an error?")
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.set_grad_enabled(True)
        scope = {"__name__": "driver"}
        exec(source, scope)
        case = torch.load(io.BytesIO(base64.b64decode(arguments)), weights_only=True)
        torch.save(scope[driver](*[names[name] for name in answers], **case), reply)
    except Exception as raised:
        error, reply = _describe_error(raised) or "an error", io.BytesIO()
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        torch.set_default_device(None if device == torch.device("cpu") else device)
    content = base64.b64encode(reply.getvalue()).decode()
    publish_display_data({mime_type: content, "text/plain": error})
