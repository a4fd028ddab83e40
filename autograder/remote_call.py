"""What runs in the student's kernel when a check calls: it travels there as source, and uses nothing from this package."""


def call_driver(names: dict, source: str, driver: str, answers: list[str], arguments: str, mime_type: str) -> None:
    """Call `driver(*answers, **arguments)` there, and send what it returns as a display of the given type.

    Args:
        names: the student's global names.
        source: defines the driver.
        answers: names of the student's functions or classes.
        arguments: what `torch.save` makes of the keyword arguments, in base64.
        mime_type: of the reply, which is what `torch.save` makes of the driver's, in base64. If the call raised, the
            display's plain text says what, and the reply is empty.
    """
    import base64
    import io

    import torch
    from IPython.display import publish_display_data

    error, reply = "", io.BytesIO()
    try:
        missing = [name for name in answers if name not in names]
        if missing:
            raise NameError(f"`{'` and `'.join(missing)}` not defined: is the cell missing, or did it raise an error?")
        scope = {"__name__": "driver"}
        exec(source, scope)
        case = torch.load(io.BytesIO(base64.b64decode(arguments)), weights_only=True)
        torch.save(scope[driver](*[names[name] for name in answers], **case), reply)
    except Exception as raised:
        error, reply = _describe_error(raised) or "an error", io.BytesIO()
    content = base64.b64encode(reply.getvalue()).decode()
    publish_display_data({mime_type: content, "text/plain": error})
