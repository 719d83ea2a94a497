"""Runs one lab's tests in a forked child: the same code on a laptop and in a container.

Stands on the standard library, psutil, pytest and `shared` only, so that it starts quickly and
fits into any image.
"""
