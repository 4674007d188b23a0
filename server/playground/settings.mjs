// Sampling settings: only those that are filled in are sent.

export function optionsOf(form) {
  const options = {};
  for (const input of form.querySelectorAll("input[name]")) {
    if (input.value.trim() === "") continue;
    if (!input.checkValidity()) throw new Error(`${input.labels[0].textContent.trim()}: ${input.validationMessage}`);
    options[input.name] = Number(input.value);
  }
  return options;
}
