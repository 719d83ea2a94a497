# Loads Topeka's pytest plugin, also from a bare checkout where nothing is installed:
# pyproject.toml puts shared/src and grader/src on the path before this file is read.
#
# In importlib mode pytest names a test module after its folder, grader/tests/test_x.py becomes
# grader.tests.test_x, and makes up a package `grader` if none is imported yet.
import grader  # noqa: F401

# pytester (part of pytest) runs pytest inside the plugin's own tests; only the root conftest.py
# can load it.
pytest_plugins = ["shared.plugin", "pytester"]
