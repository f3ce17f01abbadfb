/** Pure: sampling parameters: what a person typed, within the site's limits; what is left empty is the site's default. */

/** @typedef {{name: string, min: number, max: number, step: number}} Field */

/** Return the fields of the panel; `limits` are those of `opened`. @returns {Field[]} */
export function fields(limits = {}) {
  return [
    { name: 'temperature', min: 0, max: 10, step: 0.05 },
    { name: 'top_p', min: 0, max: 1, step: 0.01 },
    { name: 'top_k', min: 0, max: 100_000, step: 1 },
    { name: 'min_p', min: 0, max: 1, step: 0.01 },
    { name: 'repetition_penalty', min: 0.05, max: 10, step: 0.05 },
    { name: 'max_new_tokens', min: 1, max: limits.max_new_tokens ?? 1_000_000, step: 1 },
  ];
}

/** Return the value of a field as a number, null for the default, or undefined where it is not allowed. */
export function readField({ min, max, step }, text) {
  if (String(text ?? '').trim() === '') return null;
  const value = Number(text);
  if (!Number.isFinite(value) || value < min || value > max || (step === 1 && !Number.isInteger(value))) return undefined;
  return value;
}

/** Return what to send of kept settings: fields that have a value that is allowed; a greater length is cut to the limit. */
export function toParams(kept, limits = {}) {
  const params = {};
  for (const field of fields(limits)) {
    const value = readField(field, kept[field.name]);
    if (typeof value === 'number') params[field.name] = value;
    else if (value === undefined && field.name === 'max_new_tokens') params[field.name] = field.max;
  }
  return params;
}
