"""Small programs that show one idea each."""
