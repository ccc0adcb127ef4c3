"""The C API through ctypes: structs, enums and functions as kernels/include/vlmq.h declares them.

The header is read, not repeated. What this does not understand in it is an error: better none than a wrong layout.
"""

import ctypes
import re

import torch

SCALARS = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "uint8_t": ctypes.c_uint8,
    "size_t": ctypes.c_size_t,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}

# What a pointer to each type may be given. PyTorch does little with unsigned words: they are passed as signed ones.
POINTEES = {
    "float": {torch.float32},
    "double": {torch.float64},
    "int32_t": {torch.int32},
    "uint32_t": {torch.int32},
    "uint8_t": {torch.uint8},
    "vlmq_span": {torch.int32},
    "void": None,
}

# Filled in by the call itself.
WORKSPACE = {"workspace", "workspace_bytes"}


class HeaderError(Exception):
    """The header holds what this module does not understand."""


class CallFailed(Exception):
    """A call returned another status than VLMQ_OK."""


class Header:
    """Enums, structs and functions of a header."""

    def __init__(self, text):
        text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
        text = re.sub(r"#ifdef __cplusplus.*?#endif", " ", text, flags=re.S)
        self.constants, self.enums, self.structs, self.fields, self.functions = {}, {}, {}, {}, {}
        for name, value in re.findall(r"^#define +(\w+) +(\d+) *$", text, flags=re.M):
            self.constants[name] = int(value)
        text = re.sub(r"^#.*$", " ", text, flags=re.M)
        # Declarations end in a semicolon outside of braces.
        for declaration in re.findall(r"(?:[^;{}]|\{[^{}]*\})*;|\S.*", text, flags=re.S):
            self.declaration(" ".join(declaration.split()))
        if not self.functions or not self.structs:
            raise HeaderError("no function or no struct was found")

    def declaration(self, text):
        if text == "typedef struct CUstream_st* vlmq_stream;":
            return
        if match := re.fullmatch(r"typedef enum (\w+) \{ (.*?),? ?\} \1;", text):
            self.enum(match[1], match[2])
        elif match := re.fullmatch(r"typedef struct (\w+) \{ (.*); \} \1;", text):
            self.struct(match[1], match[2])
        elif match := re.fullmatch(r"vlmq_status vlmq_(\w+)\(const (\w+)\* args, vlmq_stream stream\);", text):
            self.functions[match[1]] = match[2]
        elif match := re.fullmatch(r"size_t vlmq_(\w+)_workspace_bytes\(const (\w+)\* args\);", text):
            if match[2] != f"vlmq_{match[1]}_args":
                raise HeaderError(text)
        elif text != "const char* vlmq_last_error(void);":
            raise HeaderError(f"not understood: {text}")

    def enum(self, name, body):
        values = {}
        for entry in body.split(", "):
            match = re.fullmatch(r"(\w+) = (\d+)", entry)
            if not match:
                raise HeaderError(f"enum {name}: {entry!r} does not name its value")
            values[match[1]] = int(match[2])
        self.enums[name] = values
        self.constants.update(values)

    def struct(self, name, body):
        fields, kinds = [], {}
        for entry in body.split("; "):
            match = re.fullmatch(r"(const )?(\w+)(\*?) (\w+(?:, \w+)*)", entry)
            if not match:
                raise HeaderError(f"struct {name}: {entry!r}")
            _, kind, pointer, names = match.groups()
            for field in names.split(", "):
                if field in kinds:
                    raise HeaderError(f"struct {name}: {field} twice")
                if pointer:
                    if kind not in POINTEES:
                        raise HeaderError(f"struct {name}: a pointer to {kind}")
                    c_type = ctypes.c_void_p
                elif kind in self.enums:
                    c_type = ctypes.c_int
                elif kind in self.structs:
                    c_type = self.structs[kind]
                elif kind in SCALARS:
                    c_type = SCALARS[kind]
                else:
                    raise HeaderError(f"struct {name}: {field} of unknown type {kind}")
                fields.append((field, c_type))
                kinds[field] = kind + pointer
        self.structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
        self.fields[name] = kinds


class Api:
    """A library of the kernels, and the device its pointers belong to."""

    def __init__(self, header, library):
        self.header = Header(open(header).read())
        self.library = ctypes.CDLL(str(library))
        self.emulated = hasattr(self.library, "vlmq_emulator_set_seed")
        self.device = torch.device("cpu" if self.emulated else "cuda:0")
        self.last_error = getattr(self.library, "vlmq_last_error", None)
        if self.last_error is not None:
            self.last_error.restype, self.last_error.argtypes = ctypes.c_char_p, []
        self.entries, self.queries = {}, {}
        for name, struct in self.header.functions.items():
            arguments = ctypes.POINTER(self.header.structs[struct])
            entry = getattr(self.library, f"vlmq_{name}")
            entry.restype, entry.argtypes = ctypes.c_int, [arguments, ctypes.c_void_p]
            self.entries[name] = entry
            if "workspace" in self.header.fields[struct]:
                query = getattr(self.library, f"vlmq_{name}_workspace_bytes")
                query.restype, query.argtypes = ctypes.c_size_t, [arguments]
                self.queries[name] = query
        self.statuses = {value: name for name, value in self.header.enums["vlmq_status"].items()}

    def seed(self, number):
        """The schedule of the emulator's next launches."""
        if self.emulated:
            self.library.vlmq_emulator_set_seed(ctypes.c_uint64(number))

    def stream(self):
        """PyTorch's current stream."""
        return None if self.emulated else torch.cuda.current_stream().cuda_stream


class Call:
    """One call with its arguments, which may be run any number of times.

    Fields by name: tensors and None for pointers, lists for pointers to host memory, numbers, names of enums' values, dicts for
    structs. Numbers must all be given; pointers that are not are NULL. Work space is allocated here where `workspace` is not
    given: a function from bytes to a tensor.
    """

    def __init__(self, api, name, workspace=None, **fields):
        self.api, self.name, self.entry = api, name, api.entries[name]
        self.struct = api.header.functions[name]
        self.keep = []
        self.args = self.filled(self.struct, fields)
        self.workspace = None
        if name in api.queries:
            size = api.queries[name](ctypes.byref(self.args))
            if workspace is None:
                # CPU tensors are aligned to 64 bytes only.
                whole = torch.empty(size + 256, dtype=torch.uint8, device=api.device)
                self.workspace = whole[-whole.data_ptr() % 256 :][:size]
            else:
                self.workspace = workspace(size)
            self.args.workspace = self.workspace.data_ptr() or None
            self.args.workspace_bytes = size
        self.pointer = ctypes.byref(self.args)

    def filled(self, struct, fields):
        kinds = self.api.header.fields[struct]
        args = self.api.header.structs[struct]()
        unknown = set(fields) - set(kinds)
        missing = {f for f, kind in kinds.items() if not kind.endswith("*")} - set(fields) - WORKSPACE
        if unknown or missing:
            raise HeaderError(f"{struct}: unknown {sorted(unknown)}, missing {sorted(missing)}")
        for field, value in fields.items():
            setattr(args, field, self.value(struct, field, kinds[field], value))
        return args

    def value(self, struct, field, kind, value):
        constants = self.api.header.constants
        if kind.endswith("*"):
            if value is None:
                return None
            if isinstance(value, list):
                array = (SCALARS[kind[:-1]] * len(value))(*value)
                self.keep.append(array)
                return ctypes.cast(array, ctypes.c_void_p)
            allowed = POINTEES[kind[:-1]]
            if allowed is not None and value.dtype not in allowed:
                raise HeaderError(f"{struct}.{field} is {kind}, not {value.dtype}")
            if value.device.type != self.api.device.type:
                raise HeaderError(f"{struct}.{field} lies on {value.device}")
            # Dense rows one behind the other, or as far apart as a stride of the call says.
            strided = f"{field}_stride" in self.api.header.fields[struct]
            if not (value.is_contiguous() or strided and value.stride(-1) == 1):
                raise HeaderError(f"{struct}.{field}: strides {value.stride()} of {tuple(value.shape)}")
            self.keep.append(value)
            return value.data_ptr() or None
        if isinstance(value, dict):
            return self.filled(kind, value)
        return constants[value] if isinstance(value, str) else value

    def __call__(self):
        """Enqueues on PyTorch's current stream."""
        status = self.entry(self.pointer, self.api.stream())
        if status != 0:
            why = self.api.last_error() if self.api.last_error is not None else None
            why = f": {why.decode(errors='replace')}" if why else ""
            raise CallFailed(f"vlmq_{self.name} returned {self.api.statuses.get(status, status)}{why}")

    def status(self):
        """Enqueues, and gives the status as a name."""
        return self.api.statuses.get(self.entry(self.pointer, self.api.stream()))
