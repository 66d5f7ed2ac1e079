"""Executes the library's jaxtyping annotations: `install` before the packages are imported, as conftest.py does.

jaxtyping's own import hook wraps every function and dataclass of a module. This one wraps only what has shapes, and
differs in what it does with arguments that an annotation refuses: the function may refuse them too, by the ValueError
that its users see, who have no hook. Where it does not, annotation and function disagree, and that is an error.
"""

import ast
import dataclasses
import functools
import importlib.machinery
import inspect
import sys

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

PACKAGES = ("jaxpipe", "eplb_jax", "profiling")
strictly = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as type checkers have it


def checked(function):
    """The function with its annotations executed: of its arguments first, then of what it returns with them."""

    @functools.cache
    def strict():
        # At the first call, when all names of the module are there: what jaxtyping cannot resolve it leaves out.
        for annotation in function.__annotations__.values():
            if isinstance(annotation, str) and has_shape(ast.parse(annotation)):
                eval(annotation, function.__globals__)
        return jaxtyping.jaxtyped(function, typechecker=strictly)

    refusal = f"Type-check error whilst checking the parameters of {function.__module__}.{function.__qualname__}."

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        __tracebackhide__ = True
        try:
            return strict()(*args, **kwargs)
        except jaxtyping.TypeCheckError as error:
            if not str(error).startswith(refusal):
                raise
            refused = error
        # What NumPy reads is legal where loads are wanted, and has no shape yet: lists, tensors of PyTorch.
        if any(hasattr(type(value), "__array__") or isinstance(value, list) for value in args if not is_array(value)):
            return function(*args, **kwargs)
        try:
            function(*args, **kwargs)
        except ValueError:
            raise
        except Exception:
            pass
        raise refused

    return wrapper


def checked_class(cls):
    """The dataclass or NamedTuple, whose fields are checked when a program makes it of arrays.

    It is a pytree too, which JAX makes of what it likes: of stacked arrays, of shardings, of nothing.
    """
    if hasattr(cls, "check"):  # does it itself, later, with the ValueError that users see
        return cls
    name = "__init__" if dataclasses.is_dataclass(cls) else "__new__"
    begin = getattr(cls, name)
    signature = inspect.signature(begin)
    types = {field: str(getattr(kind, "__forward_arg__", kind)) for field, kind in cls.__annotations__.items()}
    types = {field: kind for field, kind in types.items() if has_shape(ast.parse(kind))}
    scope = {}
    code = f"def {cls.__qualname__}({', '.join(f'{field}: {kind!r}' for field, kind in types.items())}): pass"
    exec(code, vars(sys.modules[cls.__module__]), scope)
    check = jaxtyping.jaxtyped(scope[cls.__qualname__], typechecker=strictly)

    @functools.wraps(begin)
    def wrapper(self, *args, **kwargs):
        __tracebackhide__ = True
        found = signature.bind(self, *args, **kwargs)
        found.apply_defaults()
        of_arrays = {field: found.arguments[field] for field in types}
        by_jax = sys._getframe(1).f_globals.get("__name__", "").split(".")[0] == "jax"
        if not by_jax and all(value is None or is_array(value) for value in of_arrays.values()):
            check(**of_arrays)
        return begin(self, *args, **kwargs)

    setattr(cls, name, wrapper)
    return cls


def is_array(value):
    return isinstance(value, jax.Array | np.ndarray)


SHAPES = frozenset({"Bool", "Float", "Inexact", "Int", "Integer", "Key", "Num", "Shaped", "UInt"})


def has_shape(tree):
    """Whether an annotation names a shape: ``Float[Array, "rows"]``."""
    return any(isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in SHAPES for node in ast.walk(tree))


def decorate(tree):
    """Wraps the functions and classes of a module's syntax tree that have shapes; returns how many."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            all_of_them = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            annotations = [argument.annotation for argument in all_of_them] + [node.returns]
            # Innermost: what jit, custom_vjp or classmethod make of a function is no function.
            place, name = len(node.decorator_list), "checked"
        elif isinstance(node, ast.ClassDef):
            annotations = [line.annotation for line in node.body if isinstance(line, ast.AnnAssign)]
            place, name = 0, "checked_class"
        else:
            continue
        if any(annotation is not None and has_shape(annotation) for annotation in annotations):
            decorator = ast.parse(f"__import__('tests.shapes').shapes.{name}", mode="eval").body
            for part in ast.walk(decorator):
                ast.copy_location(part, node)
            node.decorator_list.insert(place, decorator)
            count += 1
    return count


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a module with what has shapes wrapped; never from a file of byte code."""

    def get_code(self, fullname):
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        decorate(tree)
        return compile(tree, path, "exec", dont_inherit=True)


class Finder:
    """Finds the modules of the packages that import jaxtyping."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname.split(".")[0] not in PACKAGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return None
        if b"jaxtyping" not in spec.loader.get_data(spec.loader.path):
            return None
        spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def install():
    """Wraps all modules that are imported from now on; must run before the packages are."""
    early = [name for name in sys.modules if name.split(".")[0] in PACKAGES]
    assert not early, f"imported before their shapes could be checked: {early}"
    sys.meta_path.insert(0, Finder)
