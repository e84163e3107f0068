"""Forms of batches and outputs: how a network is called with a batch, and which tensor of its output is measured."""
