"""The stretches world: a small, constructed task in which PEAR's weights can be watched at work."""
