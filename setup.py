"""Builds the decode kernels, once for each kind of processor that the result may meet; `pyproject.toml` has the rest.

The extension is optional: without a C++ compiler the installation goes on, and everything runs in torch.
"""

import os
import platform
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = "dijiang_model/native/src"
DIGEST = runpy.run_path("dijiang_model/native/digest.py")["source_digest"](Path(SOURCE))
HEADERS = sorted(str(path) for path in Path(SOURCE).glob("*.h"))
# Neither -ffast-math nor contraction: a row's sums must come in the same order and rounding in every batch.
# GCC 12 warns of its own headers.
QUIET = ("-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
COMMON = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-g0", "-pthread", *QUIET)
VARIANTS = {"base": ()}
if platform.machine().lower() in ("x86_64", "amd64"):
    AVX512 = ("-march=x86-64-v4", "-mavx512vnni")
    TILES = ("-mamx-tile", "-mamx-int8", "-mamx-bf16")
    VARIANTS |= {"avx2": ("-march=x86-64-v3",), "avx512": AVX512, "avx512bf16": (*AVX512, "-mavx512bf16")}
    VARIANTS |= {"amx": (*AVX512, *TILES)}


def is_current(library: Path) -> bool:
    """Whether it was built from the sources at hand, with the options below."""
    if not library.exists() or library.stat().st_mtime < Path("setup.py").stat().st_mtime:
        return False
    return DIGEST.encode() in library.read_bytes()


class BuildKernels(build_ext):
    """Builds what is not of the sources at hand, whatever the files' times say; changes no library that is in use."""

    def build_extension(self, ext: Extension) -> None:
        built, installed = Path(self.get_ext_fullpath(ext.name)), Path(self.get_ext_filename(ext.name))
        if is_current(installed) and installed != built:  # an editable installation begins with an empty folder
            built.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(installed, built)
            return
        if built.exists() and not is_current(built):
            built.unlink()
        super().build_extension(ext)

    def copy_file(self, infile: Any, outfile: Any, *arguments: Any, **options: Any) -> Any:
        """Into place by renaming: whoever opens the library meanwhile finds the old one or the new one, whole."""
        beside = f"{outfile}.{os.getpid()}"
        super().copy_file(infile, beside, *arguments, **options)
        os.replace(beside, outfile)
        return str(outfile), True


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[]
    if sys.platform == "win32"
    else [
        Extension(
            f"dijiang_model.native._kernels_{variant}",
            # One source for every variant: setuptools wants distinct object files, hence one-line wrappers.
            sources=[f"{SOURCE}/kernels_{variant}.cpp"],
            depends=["setup.py", *(f"{SOURCE}/{name}.cpp" for name in ("choose", "decode", "step")), *HEADERS],
            define_macros=[
                ("DIJIANG_SOURCE", f'"{DIGEST}"'),
                # A namespace of its own for each build: the linker would share a function's static objects among all
                # libraries of a process, and a library that was built again may lay them out differently.
                ("dijiang", f"dijiang_{variant}_{DIGEST[:12]}"),
            ],
            extra_compile_args=[*COMMON, *options],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for variant, options in VARIANTS.items()
    ],
)
