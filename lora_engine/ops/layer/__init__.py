"""The halves of a decoder layer, each as one autograd function."""
