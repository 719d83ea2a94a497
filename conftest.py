# Loads Topeka's pytest plugin, also from a bare checkout where nothing is installed:
# pyproject.toml puts shared/src on the path before this file is read.
pytest_plugins = ["shared.plugin"]
