"""Every place where a plug-in can add something.

Each hook takes no argument and returns a list.  Unless its docstring says otherwise the list holds classes, and each class has a `name`
(a `ClassVar[str]`, lower case), by which recipes, checkpoints and the command line ask for it.  Imports belong inside the hook, so that
listing plug-ins stays quick:

    @hookimpl
    def qcore_formats():
        from qplug_ternary.ternary import Ternary

        return [Ternary]

A hook that only a later qcore has is marked `@hookimpl(optionalhook=True)`: an older one then passes over it instead of refusing it.
"""

import pluggy

# Raised when a hook is removed or changes what it returns; new hooks leave it alone.  A plug-in may declare the one it was written for
# in its module, as QCORE_PLUGIN_API = "1"; one that declares a newer major number is not registered.
PLUGIN_API = "1"

hookspec = pluggy.HookspecMarker("qcore")
hookimpl = pluggy.HookimplMarker("qcore")


@hookspec
def qcore_formats():
    """Number formats: what numbers a code can stand for.  Proved by `qcore.testing.check_format`."""


@hookspec
def qcore_observers():
    """Observers: what is kept of the tensors seen in calibration, for solvers and transforms that ask for it."""


@hookspec
def qcore_transforms():
    """Transforms: find a rewrite that keeps the function and eases the numbers.  Proved by `qcore.testing.check_transform`."""


@hookspec
def qcore_solvers():
    """Solvers: choose the codes of one matrix.  Proved by `qcore.testing.check_solver`."""


@hookspec
def qcore_block_solvers():
    """Block solvers: improve the codes of a block's weights together, by what the block puts out."""


@hookspec
def qcore_allocators():
    """Allocators: give each site its spec and solver within a budget of bits."""


@hookspec
def qcore_selectors():
    """Selectors: choose k samples out of many, by their embeddings."""


@hookspec
def qcore_modules():
    """Run-time modules: every module that a checkpoint may contain and that torch or the model's own library does not bring."""


@hookspec
def qcore_packings():
    """Packings: how codes and scales lie in memory and in a file."""


@hookspec
def qcore_kernels():
    """Kernels: run an op over one packing on one kind of device."""


@hookspec
def qcore_adapters():
    """Adapters: all that qcore knows of a model family.  Proved by `qcore.testing.check_adapter`."""


@hookspec
def qcore_sources():
    """Model sources: how a name or folder becomes a model."""


@hookspec
def qcore_calibrations():
    """Calibration sources: data that is read, selected or generated."""


@hookspec
def qcore_tasks():
    """Tasks: a model, its data and a metric."""


@hookspec
def qcore_exporters():
    """Exporters: write a quantized model for another program."""


@hookspec
def qcore_lowerings():
    """Lowerings: turn a quantized model into a whole other program, an integer-only one for instance."""


@hookspec
def qcore_recipes():
    """Recipe files: paths to TOML files, or to folders of them (not searched deeper).  A recipe's name is its file's stem."""


@hookspec
def qcore_commands():
    """Commands of `qcore`: a function becomes one command, named as the function with `-` for `_`;
    a `typer.Typer(name="zoo")` becomes the group `qcore zoo …`.
    """


KINDS = tuple(name.removeprefix("qcore_") for name in tuple(globals()) if name.startswith("qcore_"))
