"""Drives CMake; CMakeLists.txt says what is built. Settings come from the environment, see README.md, "Building"."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "locas_ext/version.py").read_text(), re.M)[1]


def cuda_architectures() -> str | None:
    """LOCAS_CUDA_ARCHS ("80;90a") or else TORCH_CUDA_ARCH_LIST ("8.0 9.0a+PTX"), in CMake's form."""
    text = os.environ.get("LOCAS_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not text:
        return None
    names = re.split(r"[;,\s]+", text.strip())
    architectures = [name.replace("+PTX", "").replace(".", "") for name in names if name]
    unknown = [name for name in architectures if not re.fullmatch(r"\d{2,3}[a-z]?", name)]
    if unknown:
        sys.exit(f"locas_ext: CUDA architecture {unknown[0]!r} not understood; expected names such as 80, 8.0 or 90a")
    return ";".join(architectures)


class CMakeBuild(build_ext):
    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        import pybind11  # a build requirement, so absent while metadata is read

        options = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "LOCAS_VERSION": VERSION,
            "LOCAS_CUDA": os.environ.get("LOCAS_CUDA", "auto"),
        }
        if architectures := cuda_architectures():
            options["LOCAS_CUDA_ARCHS"] = architectures
        defines = [f"-D{name}={value}" for name, value in options.items()]
        # The cmake and ninja installed beside this Python come before the system's, which may be too old.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path}
        cmake = shutil.which("cmake", path=path) or sys.exit("locas_ext: cmake not found; pip install cmake ninja")
        for arguments in ["-G", "Ninja", ROOT, *defines], ["--build", "."]:
            if subprocess.run([cmake, *arguments], cwd=build, env=environment).returncode:
                needs = "a C++20 compiler, Python's headers, cmake and ninja"
                sys.exit(f'locas_ext: not built, for the reason above; it needs {needs} (README.md, "Building")')


setup(
    version=VERSION,
    ext_modules=[Extension("locas_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
