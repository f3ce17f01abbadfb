/** The English texts, for tests of modules that make sentences. */

import { readFileSync } from 'node:fs';
import { useCatalogue } from '../../static/js/i18n.js';

export const english = JSON.parse(readFileSync(new URL('../../static/locales/en.json', import.meta.url), 'utf8'));
useCatalogue('en', english);
