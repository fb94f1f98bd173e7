"""CUDA C++ compiled at run time, with NVRTC and the driver, which come with PyTorch and the card.

No toolkit is needed, no header and no build when the package is installed. What is not there raises
`CompilerMissing`, and callers go on without the kernel.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

SUCCESS = 0
HOPPER = (9, 0)  # the first GPUs with programmatic launch


class CompilerMissing(RuntimeError):
    """There is no compiler at run time, no driver, or it refuses the kernel."""


def load_compiler() -> ctypes.CDLL:
    """NVRTC of the CUDA version that PyTorch was built for.

    Raises:
        CompilerMissing: it is not installed.
    """
    if torch.version.cuda is None:
        raise CompilerMissing("this PyTorch has no CUDA")
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    try:
        return ctypes.CDLL(name)  # where the system has it, or PyTorch has loaded it
    except OSError:
        pass
    for folder in sys.path:
        for path in Path(folder).glob(f"nvidia/*/lib/{name}"):  # of a package PyTorch depends on
            for builtins in path.parent.glob("libnvrtc-builtins.so*"):
                ctypes.CDLL(str(builtins))  # the compiler looks for it by name alone
            return ctypes.CDLL(str(path))
    raise CompilerMissing(f"{name} is not installed")


def load_driver() -> ctypes.CDLL:
    """The CUDA driver.

    Raises:
        CompilerMissing: there is none.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CompilerMissing(f"no CUDA driver: {error}") from error


def compile_source(source: str, constants: Mapping[str, int], architecture: str) -> bytes:
    """Machine code of CUDA C++ for an architecture such as `sm_90`, with macros `constants`.

    Raises:
        CompilerMissing: there is no compiler, or it refuses the source; the message is its own.
    """
    nvrtc = load_compiler()
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, 0, None, None))
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    for name, value in constants.items():
        options.append(f"--define-macro={name}={value}")
    encoded = [option.encode() for option in options]
    status = nvrtc.nvrtcCompileProgram(
        program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded)
    )
    size = ctypes.c_size_t()
    if status != SUCCESS:
        _check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        message = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetProgramLog(program, message))
        raise CompilerMissing(f"NVRTC refuses the kernel: {message.value.decode()}")
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
    code = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    _check(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))
    return code.raw


class CudaKernel:
    """A kernel of compiled code on the current device, ready to be launched.

    Raises:
        CompilerMissing: the driver refuses the code.
    """

    def __init__(self, code: bytes, name: str) -> None:
        self.driver = load_driver()
        self.code = code
        self.module = ctypes.c_void_p()
        self.function = ctypes.c_void_p()
        torch.cuda.current_stream()  # makes PyTorch's context, into which the code is loaded
        _check(self.driver.cuModuleLoadData(ctypes.byref(self.module), code))
        _check(
            self.driver.cuModuleGetFunction(ctypes.byref(self.function), self.module, name.encode())
        )

    def launch(self, blocks: int, threads: int, arguments: Sequence[Tensor | int | float]) -> None:
        """Run the kernel on the current stream.

        Args:
            arguments: tensors become pointers, int `int`, float `float`.
        """
        values = [_as_c_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))()
        for place, value in enumerate(values):
            pointers[place] = ctypes.addressof(value)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        grid = (blocks, 1, 1)
        block = (threads, 1, 1)
        shared_bytes = 0
        _check(
            self.driver.cuLaunchKernel(
                self.function, *grid, *block, shared_bytes, stream, pointers, None
            )
        )


def _as_c_value(argument: Tensor | int | float) -> ctypes._SimpleCData:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int(argument)


def _check(status: int) -> None:
    if status != SUCCESS:
        raise CompilerMissing(f"CUDA reports the error {status}")
