"""Explicit solvers: Runge-Kutta, stochastic Runge-Kutta."""
