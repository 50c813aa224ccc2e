"""What runs on a device: inputs, graphs, paths of a decode step, copies of KV."""
