from tests.runtimes.conftest import swept
from tests.warm.conftest import launcher

__all__ = ["launcher", "swept"]
