"""The real side of every port: containers, devices, model folders, time."""
