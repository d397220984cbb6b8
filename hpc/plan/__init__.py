"""Pure arithmetic from configuration and machine facts to what will run. Imports no deep-learning library."""
