"""The code under test in a process of its own: tests call it over a socket.

`wire` says how values cross, `server` is the side with the code, `client` the side with the tests. Nothing is
pickled: plain data crosses as JSON, tensors and arrays as safetensors buffers, everything else as a handle.
"""
