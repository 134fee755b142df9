"""`python -m fedjax_llm` is `fedjax-llm`."""

from fedjax_llm.cli import main

if __name__ == "__main__":
    main()
