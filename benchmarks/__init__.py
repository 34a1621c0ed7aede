"""How fast the engines are, beside what a researcher would write without them. Needs the repository, not only the
package."""
