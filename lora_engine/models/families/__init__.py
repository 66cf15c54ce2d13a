"""Data about families of models: what their classes, modules and settings are called, and hold."""
