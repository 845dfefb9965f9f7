"""What zeros are worth: sparse files, faster inference, and what was measured of them.

- `storage`: sparse files; `save_sparse` and `load_sparse`
- `pieces`: how the elements of a tensor are stored there
- `accelerate`: a copy for inference, each layer in the form measured fastest
- `summary`: what a network costs; `summarize`
- `sizes`: the one way to size
- `timing`: the one way to time
- `running`: how a model is called with an example
"""
