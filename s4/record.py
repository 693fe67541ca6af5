"""Records: dataclasses as far as s4 uses them, for modules that a short command imports.

The real ones take 3 ms of each start, more than all else that `s4 map` needs besides Fire and a socket.
"""

__all__ = ["asdict", "record", "replace"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dataclasses import asdict, replace
    from dataclasses import dataclass as record
else:

    def record(cls):  # noqa: ANN001, ANN201 - type checkers see a dataclass
        """Give a class a constructor for its annotated fields, and equality by them."""
        names = tuple(cls.__annotations__)
        defaults = {name: vars(cls)[name] for name in names if name in vars(cls)}

        def init(self, *args, **given):  # noqa: ANN001, ANN002, ANN003, ANN202
            values = {**defaults, **dict(zip(names, args, strict=False)), **given}
            if len(args) > len(names) or values.keys() != set(names):
                raise TypeError(f"{cls.__name__} has the fields {', '.join(names)}, not {', '.join(values)}")
            vars(self).update((name, values[name]) for name in names)

        cls.__init__ = init
        cls.__eq__ = lambda self, other: type(other) is cls and vars(self) == vars(other)
        cls.__hash__ = None
        cls.__repr__ = lambda self: f"{cls.__name__}(**{vars(self)!r})"
        return cls

    def replace(obj, **changes):  # noqa: ANN001, ANN003, ANN201
        """The same record with other values of some fields."""
        return type(obj)(**(vars(obj) | changes))

    def asdict(obj):  # noqa: ANN001, ANN201
        """The fields of a record by name, also of the records in its lists."""
        return {name: _plain(value) for name, value in vars(obj).items()}

    def _plain(value):  # noqa: ANN001, ANN202
        if isinstance(value, list | tuple):
            return [_plain(each) for each in value]
        return asdict(value) if hasattr(value, "__dict__") else value
