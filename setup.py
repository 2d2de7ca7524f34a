"""The one part of the build that pyproject.toml can't say: the codec kernels in C, left out where no compiler is."""

from pathlib import Path

from setuptools import Extension, setup

# contraction would round a product and a sum once where numpy rounds twice
FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-Wno-parentheses"]

setup(
    ext_modules=[
        Extension(
            "refleet.common._kernels",
            ["common/_kernels.c"],
            depends=[str(path) for path in sorted(Path("common").glob("_kernels*.h"))],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=FLAGS,
            py_limited_api=True,
            optional=True,  # without a compiler the numpy form does the work
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
